"""Hugging Face's Trainer on a run's model and data, for tools/hf_trainer.py."""
