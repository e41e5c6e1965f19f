#!/bin/sh
# The hub's proxy calls the server by the Space's name, and shows it in a frame of the hub's page.
set -eu
exec pldr studio ${PLDR_MODEL:+"$PLDR_MODEL"} --host 0.0.0.0 --port 7860 --no-browser \
  --allow-host "${SPACE_HOST:-localhost}" --allow-frame https://huggingface.co
