#!/bin/sh
# Upload a file by the protocol of the IETF with curl alone: ietf.sh URL FILE HEADS
# It is one PUT if nothing happens. It goes on where an earlier process has stopped, which it knows from the heads of
# the interim answer.
set -u
url=$1 file=$2 heads=$3
origin=$(echo "$url" | cut -d/ -f1-3)

# An error of the network is worth another try, and so are these: 409 is for an old offset, 5xx for better times.
draft() { curl -sS -o /dev/null -w '%{http_code}\n' -H 'Upload-Draft-Interop-Version: 8' "$@"; }
check() {
    case $1 in
    000 | 1* | 409 | 5*) sleep 0.2 ;;
    4*) echo "$2: $1" >&2 && exit 1 ;;
    esac
}
field() { tr -d '\r' <"$heads" | sed -n "s/^$1: *//Ip" | tail -n 1; }

until [ -e "$heads" ] && [ -n "$(field location)" ]; do
    status=$(draft -H 'Upload-Complete: ?1' -D "$heads" -T "$file" "$url")
    check "$status" creation
    case $status in 2*) exit 0 ;; esac
done
where=$(field location)
case $where in /*) where=$origin$where ;; esac

while :; do
    heads=$3.offset
    rm -f "$heads" && check "$(draft -I -D "$heads" "$where")" offset
    [ -e "$heads" ] || continue
    [ "$(field upload-complete)" = '?1' ] && exit 0
    offset=$(field upload-offset)
    case $offset in
    '') continue ;;
    0) rest= ;;
    *) rest="-C $offset -H Content-Range:" ;;
    esac
    # $rest is a list of words.
    check "$(draft -X PATCH -H 'Content-Type: application/partial-upload' -H "Upload-Offset: $offset" \
        -H 'Upload-Complete: ?1' $rest -T "$file" "$where")" append
done
