# To be sourced with a name and arguments of train_gpt.py: sets `start` to those that begin the run,
# or go on with it where a job of this name was ended before: the run's own folder has its settings.
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
