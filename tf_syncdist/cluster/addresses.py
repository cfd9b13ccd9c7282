"""Network addresses."""

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Returns whether an address can be reached from this machine only."""
    try:
        infos = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(i[4][0]).split("%")[0]).is_loopback for i in infos)
