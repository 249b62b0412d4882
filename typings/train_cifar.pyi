# As common.pyi: scripts in examples/ find each other by their names alone.
from examples.train_cifar import parse_arguments as parse_arguments
from examples.train_cifar import train as train
