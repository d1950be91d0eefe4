"""What training a detector needs beside the library: data, evaluation, averages of weights."""
