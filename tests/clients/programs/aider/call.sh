cp form .env
aider --model anthropic/claude-haiku-4-5 --message "$2" --no-git --yes-always --no-check-update --analytics-disable --no-show-model-warnings
