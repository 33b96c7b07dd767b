#!/bin/sh
# Found the federation of docker-compose.yml: authority, identities, first user of the dashboard. Does nothing twice.
#   found HOST...     names under which the coordinator is reached from outside
set -eu
pki=${HANSA_PKI:?} members=${HANSA_MEMBERS:?}
if [ ! -e "$pki/authority.key" ]; then
  hosts=
  for host in coordinator "$@"; do hosts="$hosts --host $host"; done
  # shellcheck disable=SC2086 # one word each
  hansa pki init compose $hosts
fi
for each in agent-1:agent agent-2:agent agent-3:agent dashboard:operator admin:admin; do
  name=${each%:*}
  [ -e "$members/$name/identity.pem" ] || hansa pki issue "$name" --role "${each#*:}" --into "$members/$name"
done
users=$members/dashboard/users.json
[ -e "$users" ] || printf '%s\n' "${DASHBOARD_PASSWORD:?}" | hansa ui user add admin --role operator --file "$users"
