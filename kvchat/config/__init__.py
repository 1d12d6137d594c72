"""Settings, the configuration file and kvchat's folders. Must not import torch or textual."""
