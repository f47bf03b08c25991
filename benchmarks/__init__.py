"""What Samovar's speed is measured with: real servers and the real client, on artifacts of its own."""
