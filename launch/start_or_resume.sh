# Source this with a name and arguments of train_gpt.py. It sets `start` to the arguments that start the
# run, or that resume it if an earlier job of this name left a checkpoint; its folder has the settings.
tries=0
for folder in runs/"$1".[0-9]*; do
    if compgen -G "$folder/checkpoints/*/manifest.json" >/dev/null; then
        start=(--resume "$folder")
        return
    elif [ -e "$folder" ]; then
        tries=$((tries + 1)) # ended before its first checkpoint
    fi
done
start=("${@:2}" --run-name "$1.$tries")
