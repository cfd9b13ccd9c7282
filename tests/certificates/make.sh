#!/bin/sh
# Makes the certificates anew, in this directory; README.md says what each is for.
set -e
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/openssl.cnf" <<END
[req]
distinguished_name = name
prompt = no
[name]
CN = tf_syncdist tests
[ca]
default_ca = tests
[tests]
dir = $work
database = $work/index.txt
new_certs_dir = $work
rand_serial = yes
default_md = sha256
unique_subject = no
policy = anything
[anything]
commonName = supplied
END
touch "$work/index.txt"

# request NAME: a new key and a request for a certificate
request() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2> "$work/log"
    openssl req -new -config "$work/openssl.cnf" -key "$1.key" -subj "/CN=tf_syncdist $1" \
        -out "$work/$1.csr"
}

# certify NAME EXTENSION FROM UNTIL OPTIONS...
certify() {
    name=$1 from=$3 until=$4
    printf '%s\n' "$2" > "$work/extension"
    shift 4
    openssl ca -batch -notext -config "$work/openssl.cnf" -in "$work/$name.csr" \
        -extfile "$work/extension" -startdate "$from" -enddate "$until" -out "$name.pem" "$@"
}

authority() {
    request "$1"
    certify "$1" "basicConstraints=critical,CA:TRUE" 20200101000000Z 21200101000000Z \
        -selfsign -keyfile "$1.key"
}

# task NAME CA HOSTS UNTIL
task() {
    request "$1"
    certify "$1" "subjectAltName=$3" 20200101000000Z "$4" -cert "$2.pem" -keyfile "$2.key"
}

HERE=IP:127.0.0.1,IP:::1,DNS:localhost
authority ca
authority other_ca
task task ca "$HERE" 21200101000000Z
task other_host ca DNS:elsewhere.example 21200101000000Z
task expired ca "$HERE" 20200102000000Z
task stranger other_ca "$HERE" 21200101000000Z
rm ca.key other_ca.key
