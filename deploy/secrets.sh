#!/bin/sh
# Makes what deploy/compose.yaml mounts as secrets: certificates of one authority, the key that signs orders, the database's password,
# the secret of EMQX's own network.
#   secrets.sh DIRECTORY
# Each file is for the user that reads it in its container, so this runs as root: `docker compose run --rm setup` does. What is there
# already stays; the broker's files become those of BROKER_USER: 1883 is that of eclipse-mosquitto; 1000 that of emqx.
set -eu
umask 077
cd "$1"
agent_user=10001 database_user=70 broker_user=${BROKER_USER:-1883}
random() { head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; } # digits and letters: EMQX gives it on to Erlang as a word
if [ -e authority ]; then
    [ -e broker/cookie ] || random >broker/cookie # of an authority that is older than this secret
    chown -R "$broker_user" broker
    echo "$1 holds an authority already: nothing is made" >&2
    exit 0
fi
rm -rf authority.part broker coordinator agent database # of a run that did not come to its end: without an authority nobody has used them
mkdir authority.part broker coordinator agent database
edge-agent enroll broker broker --authority authority.part --out broker >/dev/null
edge-agent enroll broker localhost --authority authority.part --out coordinator >/dev/null
edge-agent enroll coordinator main --authority authority.part --out coordinator >/dev/null
edge-agent enroll node bench-1 --authority authority.part --out agent >/dev/null
edge-agent keys new coordinator/signing.key --comment "orders of the fleet lab" >agent/trusted_keys 2>/dev/null
random >database/password
random >broker/cookie
cp database/password coordinator/database.password
cp authority.part/ca.pem ca.pem
chmod 644 ca.pem
chmod 600 broker/* coordinator/* agent/* database/*
chown -R "$broker_user" broker
chown -R "$agent_user" coordinator agent
chown -R "$database_user" database
mv authority.part authority
echo "made: $(ls -d "$1"/*/ | tr '\n' ' ')"
