#!/bin/sh
# The root is mounted: the host may know.
[ ! -e /etc/jindisk/guest.json ] || /usr/lib/jindisk/running || true
