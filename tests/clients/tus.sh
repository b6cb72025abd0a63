#!/bin/sh
# Upload a file by tus with curl alone: tus.sh URL FILE HEADS
# It goes on where an earlier process has stopped, which it knows from the heads of the answer to the creation.
set -u
url=$1 file=$2 heads=$3
origin=$(echo "$url" | cut -d/ -f1-3)
size=$(stat -c %s "$file")
name=$(basename "$file" | tr -d '\n' | base64 -w 0)

# An error of the network is worth another try, and so are these: 409 is for an old offset, 5xx for better times.
tus() { curl -sS -o /dev/null -w '%{http_code}\n' -H 'Tus-Resumable: 1.0.0' "$@"; }
check() {
    case $1 in
    000 | 409 | 5*) sleep 0.2 ;;
    4*) echo "$2: $1" >&2 && exit 1 ;;
    esac
}
field() { tr -d '\r' <"$heads" | sed -n "s/^$1: *//Ip" | tail -n 1; }

until [ -e "$heads" ] && [ -n "$(field location)" ]; do
    check "$(tus -X POST -H "Upload-Length: $size" -H "Upload-Metadata: filename $name" -D "$heads" "$url")" creation
done
where=$(field location)
case $where in /*) where=$origin$where ;; esac

while :; do
    heads=$3.offset
    rm -f "$heads" && check "$(tus -I -D "$heads" "$where")" offset
    [ -e "$heads" ] || continue
    offset=$(field upload-offset)
    case $offset in
    '') continue ;;
    "$size") exit 0 ;;
    0) rest= ;;
    *) rest="-C $offset -H Content-Range:" ;;
    esac
    # $rest is a list of words.
    check "$(tus -X PATCH -H 'Content-Type: application/offset+octet-stream' -H "Upload-Offset: $offset" \
        $rest -T "$file" "$where")" append
done
