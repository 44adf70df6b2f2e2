. ./form
case claude-haiku-4-5 in *haiku*) model=claude-haiku-4.5 ;; *) model=anthropic/claude-haiku-4-5 ;; esac
options=(--no-stream)
[ "$1" = stream ] && options=()
llm -m "$model" "${options[@]}" "$2"
