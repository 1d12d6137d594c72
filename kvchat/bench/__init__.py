"""`kvchat bench` and `kvchat verify`: measurements and equality checks. Must not import the screen."""
