# The form is a whole call: its own prompt and limit make way for the scene's.
body=$(printf '{"model": "claude-haiku-4-5", "max_tokens": 16000, "messages": [{"role": "user", "content": "%s"}]}' "${2//\"/\\\"}")
answer=$(bash -eu <(sed "s|^  --data .*|  --data \"\$1\"|" form) "$body")
echo "$answer"
[[ $answer == *'"type":"message"'* || $answer == *'"type": "message"'* ]]
