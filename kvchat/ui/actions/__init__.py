"""What the chat does when it is asked to, a module for each topic: commands, and what helps them."""
