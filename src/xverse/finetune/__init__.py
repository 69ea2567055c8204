"""Fine-tuning: settings, data as examples, transformers' Trainer."""
