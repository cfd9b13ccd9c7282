"""How a process finds its part in a job."""

from tf_syncdist.cluster.child import become_aggregator
from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.strategies import options
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials


def serve_or_join(
    role: ClusterRole,
    *,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    token: str | None,
    insecure: bool,
    record_trace: str = "",
) -> Credentials:
    """Returns what a worker shows to others; a `ps` task serves here, and does not return.

    Args:
        role: What this process is.
        tls_cert: See `SyncReplicasStrategy`, as for the others.
        tls_key: .
        tls_ca: .
        token: .
        insecure: .
        record_trace: .

    Raises:
        CredentialsError: If a certificate, key or token cannot be used or would be exposed.
    """
    found = NO_CREDENTIALS
    if role.num_workers > 1:
        found = options.credentials(tls_cert, tls_key, tls_ca, token, insecure)
    if role.is_aggregator:
        become_aggregator(
            role,
            insecure,
            tls=found.uses_tls,
            variables=found.variables(),
            record_trace=record_trace,
        )
    return found
