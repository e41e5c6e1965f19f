"""`pldr studio`: one page in a browser that shows the operator at work."""
