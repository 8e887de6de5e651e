"""What an adapter costs on the host, beyond the op that it calls."""
