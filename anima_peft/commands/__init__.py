"""The sub-commands of `anima-peft`, a module each: its flags, the one call that does the work, what is printed."""
