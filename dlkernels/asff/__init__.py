"""Adaptively spatial feature fusion: softmax over levels, upsampling and the weighted sum."""
