//go:build race

package routes

// raceDetector tells that a process needs about twice the memory.
const raceDetector = true
