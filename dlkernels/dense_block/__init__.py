"""Dense blocks: layers that each add channels to one shared feature buffer."""
