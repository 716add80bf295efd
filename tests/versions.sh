#!/bin/sh
# Run the tests on other versions of the dependencies in setup.py, each set in a virtual environment in .versions/.
#
#   tests/versions.sh                 oldest and newest: downloads torch twice, which on Linux is several GB from PyPI
#   tests/versions.sh quick           the oldest Triton, transformers and PEFT on .venv's torch, and the tests near them
#
# oldest is the first release of each floor (>=2.11 is 2.11.*), newest what pip finds. For CPU builds of torch, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -eu
cd "$(dirname "$0")/.."
floors=$(sed -n 's/^ *"\([a-z]*\)>=\([0-9.]*\).*",$/\1==\2.*/p' setup.py | grep -E '^(torch|triton|transformers|peft)=')
[ "$(echo "$floors" | wc -l)" = 4 ] || { echo "tests/versions.sh: setup.py lacks a floor: $floors" >&2; exit 1; }
near="tests/kernels/test_kernels.py tests/ops/test_op.py tests/adapters/test_export.py tests/adapters/test_merge.py"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-passive}" PIP_DISABLE_PIP_VERSION_CHECK=1

make_home() { # home, requirements ...
    home=$1
    shift
    [ -e "$home/installed" ] && return
    rm -rf "$home"
    .venv/bin/python -m venv "$home"
    site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    [ "$home" != .versions/quick ] || site .venv/bin/python >"$(site "$home/bin/python")/beneath.pth"
    "$home/bin/python" -m pip install --quiet "$@"
    touch "$home/installed"
}

failed=
for set in ${*:-oldest newest}; do
    home=.versions/$set
    case $set in # Triton before 3.7 does not run in its interpreter with numpy 2.4
    oldest) make_home "$home" $floors 'numpy<2.4' -e '.[all]' ;;
    newest) make_home "$home" --upgrade torch triton transformers peft -e '.[all]' ;;
    quick) make_home "$home" $(echo "$floors" | grep -v torch) 'numpy<2.4' ;;
    *) echo "tests/versions.sh: $set is not oldest, newest or quick." >&2; exit 2 ;;
    esac
    "$home/bin/python" -m pip list 2>/dev/null | grep -E '^(numpy|torch|triton|transformers|peft) ' | xargs echo "$set:"
    PYTHONPATH=. "$home/bin/python" -m pytest -q -p no:cacheprovider $([ "$set" != quick ] || echo $near tests/peft/test_[!dt]*.py) ||
        failed="$failed $set"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
