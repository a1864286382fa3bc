#!/usr/bin/env bash
# Installs by apt what the tests need of the system and do without elsewhere: a browser for the
# report, the tools that make networks for nodes, and Slurm. Does nothing where all are there.
set -euo pipefail

say() { echo "system packages: $*"; }
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$@" >/dev/null; }

packages=()
for browser in chromium chromium-browser google-chrome none; do
  ! has "$browser" || break
done
[[ $browser != none ]] || packages+=(chromium)
has ip || packages+=(iproute2)
has nsenter || packages+=(util-linux)
has slurmctld || packages+=(slurmctld)
has slurmd || packages+=(slurmd)
has sbatch || packages+=(slurm-client)
has munged || packages+=(munge)
[[ ${packages[*]} ]] || exit 0

if ! has apt-get || [[ $(id -u) != 0 ]]; then
  say "missing: ${packages[*]}. Install them, or run this as root where there is apt-get." >&2
  exit 1
fi
started=$SECONDS
export DEBIAN_FRONTEND=noninteractive
retry=(-o Acquire::Retries=3)
apt-get "${retry[@]}" -qq update
apt-get "${retry[@]}" -qq install --no-install-recommends "${packages[@]}" >/dev/null
say "${packages[*]} installed in $((SECONDS - started)) s"
