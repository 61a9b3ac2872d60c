"""Hugging Face in, Hugging Face out, through Megatron-Bridge."""
