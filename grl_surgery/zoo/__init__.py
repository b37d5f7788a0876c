"""Every network of timm and torchvision by name: surgery tried on each, and a ledger of what came of it."""
