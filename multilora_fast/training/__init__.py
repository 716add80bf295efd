"""``multilora-fast train``: fine-tuning on tasks in JSON Lines."""
