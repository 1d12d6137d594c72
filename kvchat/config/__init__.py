"""Settings, the configuration file, and the folders that kvchat uses. Imports no torch and no textual."""
