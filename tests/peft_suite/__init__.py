"""PEFT's own tests, run with PEFT's classes or with ours in their places:
`python -m tests.peft_suite --help`."""
