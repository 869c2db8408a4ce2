"""Engines behind one interface, a module for each; what they need is imported when their functions are called.

VARIANTS: tuple[str, ...]                                # precisions, "float32", "int8" ...
missing() -> str | None                                  # the pip command, when it is not installed
prepare(hf_folder, files, variant) -> None               # converts the weights; not timed
System(files, variant, threads)                          # loads
System.generate(prompts, new_tokens, stamp) -> ids       # greedy, never stops early; prompts of one length;
                                                         # calls stamp() after each step of all rows
"""
