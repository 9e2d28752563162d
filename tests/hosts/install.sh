#!/bin/bash
# Debian's packages for tests/hosts. Daemons are not started: the tests start their own.
set -euo pipefail
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "packages are installed by root with apt-get only" >&2
  exit 1
fi
packages=(iproute2 slurmctld slurmd slurm-client mpich openmpi-bin openssh-server)
if dpkg -s "${packages[@]}" >/dev/null 2>&1; then exit 0; fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
options=(-o DPkg::Lock::Timeout=120 -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -q)
apt-get "${options[@]}" update
apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}"
