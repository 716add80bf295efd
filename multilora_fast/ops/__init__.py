"""The op on tensors; it knows no nn.Module."""
