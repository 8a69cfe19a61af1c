"""What MindSpore looks for to see that HCCL is installed; CANN ships it as a Python package."""
