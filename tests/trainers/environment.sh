#!/bin/sh
# Makes the virtual environment .trainers/NAME from NAME.txt in this folder, and installs this checkout without its
# requirements, because trainers pin older releases.
#
#   tests/trainers/environment.sh NAME [PYTHON]
#
# Lines after "# overrides" in NAME.txt replace requirements of the trainer. For CPU builds of torch from elsewhere than
# PyPI, set UV_FIND_LINKS or UV_INDEX.
set -eu
cd "$(dirname "$0")/../.."
name=$1 home=.trainers/$1 file=tests/trainers/$1.txt python=${2-.venv/bin/python}
export UV_FIND_LINKS="${UV_FIND_LINKS-${PIP_FIND_LINKS-}}" PIP_DISABLE_PIP_VERSION_CHECK=1
if cmp -s "$file" "$home/installed"; then exit; fi
uv=.trainers/uv/bin/uv
[ -x $uv ] || { "$python" -m venv .trainers/uv && .trainers/uv/bin/python -m pip install --quiet uv; }
rm -rf "$home"
$uv venv --quiet --seed --python "$python" "$home"
sed '1,/^# overrides/d' "$file" >"$home/overrides.txt"
sed '/^# overrides/,$d' "$file" >"$home/wanted.txt"
$uv pip install --quiet --python "$home/bin/python" --requirements "$home/wanted.txt" --overrides "$home/overrides.txt"
$uv pip install --quiet --python "$home/bin/python" --no-deps --editable .
# PyPI builds torchaudio for CUDA alone; on a CPU build of torch it works without its library.
[ -d /proc/driver/nvidia ] || rm -f "$home"/lib/python*/site-packages/torchaudio/lib/*.so
cp "$file" "$home/installed"
