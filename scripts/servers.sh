#!/bin/sh
# Makes sure of redis-server, the one thing of team mode that pip cannot bring. Root on Debian gets it installed.
set -eu
command -v redis-server >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "servers: installing redis-server" >&2
    # RUNLEVEL: installed is enough; the team starts its own.
    apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server >/dev/null
else
    echo "servers: redis-server is missing; run: sudo apt-get install redis-server" >&2
    exit 2
fi
