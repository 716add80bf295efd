"""The main job: fine-tune a small instruct model on four real tasks, then compare three ways to take a step."""
