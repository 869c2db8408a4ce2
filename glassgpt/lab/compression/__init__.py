"""`glassgpt lab compression`: one model in many smaller forms, by size, speed and quality."""
