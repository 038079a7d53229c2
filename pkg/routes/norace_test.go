//go:build !race

package routes

const under = 1
