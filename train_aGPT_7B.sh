#!/bin/bash --login
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_alcf.sh" "$@" # the old name of train_alcf.sh
