"""How a sweep runs, from the config of a study to its records, and how runs answer zero-shot tasks."""
