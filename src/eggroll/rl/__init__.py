"""Reinforcement learning: policies of JAX evolved on JAX's and Gymnasium's environments."""
