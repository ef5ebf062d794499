"""Times of the CUDA kernels, predicted: see benchmarks/predict.py."""
