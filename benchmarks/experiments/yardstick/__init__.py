"""The networks that Bayesian pruning has been measured on since 2016: LeNet-5 of Caffe and LeNet-300-100, on MNIST."""
