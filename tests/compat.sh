#!/bin/sh
# Runs the tests of the PEFT method on the oldest PEFT that is supported, and on one between it and the newest.
# Each gets a virtual environment of its own in .compat/, on top of .venv, from which it takes torch and pytest.
#
#   tests/compat.sh                     every pair below
#   tests/compat.sh 0.20.0:5.10.4       one pair of PEFT and transformers
set -eu
cd "$(dirname "$0")/.."
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

failed=
for pair in "${@:-0.19.1:5.3.0 0.20.0:5.10.4}"; do
    for each in $pair; do
        peft=${each%:*} transformers=${each#*:}
        home=.compat/$peft-$transformers
        if [ ! -e "$home/installed" ]; then
            rm -rf "$home"
            .venv/bin/python -m venv "$home"
            echo "$site" >"$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
            "$home/bin/python" -m pip install --quiet --disable-pip-version-check \
                "peft==$peft" "transformers==$transformers"
            touch "$home/installed"
        fi
        echo "peft $peft, transformers $transformers"
        PYTHONPATH=. "$home/bin/python" -m pytest -q -p no:cacheprovider \
            tests/test_peft*.py tests/test_export.py tests/test_from_loras.py ||
            failed="$failed $each"
    done
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
