# Ends what a test process started, however that process itself ended.
#
# Standard input is a pipe whose other end only the test process holds. One line announces one
# thing to end; the end of the pipe is the signal to do it. Runs in a process group of its own, so
# that the interrupt that stops the tests does not stop this first.
trap '' INT TERM HUP

# When a process began, in clock ticks: a reused pid has another time. Empty when it is gone or
# only waits to be reaped.
began() {
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    set -- ${stat##*) }
    [ "$1" = Z ] || echo "${20}"
}

processes='' containers='' folders='' notes=''
while read -r what value; do
    case $what in
    process) processes="$processes $value:$(began "$value")" ;;
    container) containers="$containers $value" ;;
    folder) folders="$folders$value
" ;;
    note) notes="$notes$value
" ;;
    esac
done

for process in $processes; do
    pid=${process%%:*} since=${process#*:}
    [ -n "$since" ] && [ "$(began "$pid")" = "$since" ] || continue
    kill -KILL "$pid" 2>/dev/null
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ "$(began "$pid")" = "$since" ] || break
        sleep 0.1
    done
done
for container in $containers; do
    # One that was being created when the test process was killed appears a moment later.
    [ -n "$(docker rm -f -v "$container" 2>/dev/null)" ] && continue
    sleep 1
    docker rm -f -v "$container" >/dev/null 2>&1 ||
        echo "outbox-tests: container $container could not be removed" >&2
done
printf %s "$folders" | while read -r folder; do rm -rf -- "$folder"; done
printf %s "$notes" | while read -r note; do echo "outbox-tests: $note" >&2; done
