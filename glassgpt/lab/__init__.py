"""Experiments and demonstrations: each file asks one question and answers it with numbers and a picture."""
