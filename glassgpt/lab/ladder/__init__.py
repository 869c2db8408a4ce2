"""`glassgpt lab ladder`: what each step from GPT-2 to a modern model buys."""
