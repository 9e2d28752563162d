"""Megatron-style 3D-parallel pretraining of Llama and SmolLM models on torch and DeepSpeed.

Floors, imports point down only:
training > engine, checkpoint > model > parallel | data > config | launch.
"""

__version__ = "0.1.0"
