# Completion of lwstwisted for bash: to /usr/share/bash-completion/completions/lwstwisted.

_lwstwisted() {
    local current=${COMP_WORDS[COMP_CWORD]} words
    case ${COMP_WORDS[1]} in
        serve) words="--access-log --access-log-format --allow --allow-origin --anonymous --auth --certificate --client-ca --client-certificate --config --drain-time --durability --group --help --hooks-dir --hooks-enabled-events --hooks-http --hooks-http-backoff --hooks-http-forward-headers --hooks-http-retry --hooks-http-size-limit --hooks-http-timeout --host --limit --listen --log-format --max-size --metrics --min-free --port --progress-hooks-interval --public-url --quota --root --signing-keys --tls-profile --trusted-proxy --upload-lifetime --version --workers" ;;
        check-config) words="--help --version" ;;
        fsck) words="--dry-run --help --repair --root --verify --version" ;;
        sweep) words="--dry-run --help --root --version" ;;
        sign) words="--expires --help --key --max-size --method --overwrite --path --public-url --type --version" ;;
        *) words="serve check-config fsck sweep sign --help --version" ;;
    esac
    if ((COMP_CWORD == 1)); then
        words="serve check-config fsck sweep sign --help --version"
    fi
    if ((COMP_CWORD == 1)) || [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
    fi
}
complete -o filenames -F _lwstwisted lwstwisted
