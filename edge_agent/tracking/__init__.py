"""Jobs that have ended, told to TensorBoard and MLflow through their own clients."""
